// A tile of the rows of a grouped product (a mixture of experts'): rows first .. end-1 of x, which are multiplied by matrix `expert`
// of a stack. experts.cu makes a list of them on the device; the GEMMs walk it.
#pragma once

struct Group {
    int first, end, expert, unused;
};
