"""A corpus of many files: cut into blocks, scored block by block, kept in a folder that a run can go on from."""
