// All block formats.
#pragma once
#include "floats.cuh"
#include "kquants.cuh"
#include "legacy.cuh"
