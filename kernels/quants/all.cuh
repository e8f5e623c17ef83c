// All block formats.
#pragma once
#include "codebooks.cuh"
#include "floats.cuh"
#include "kquants.cuh"
#include "legacy.cuh"
