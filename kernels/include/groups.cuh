#pragma once

// A token tile of a grouped product (a mixture of experts'): rows first .. end - 1 of x, which are multiplied by matrix
// `expert` of a stack. experts.cu lists the tiles on the device, and the GEMMs go through that list (scheduler.cuh).

struct Group {
    int first, end, expert, unused;
};
