"""Fuzzing of all readers: thousands of damaged inputs, with the results counted by verdict.

    python -m tests.campaign --inputs 10000 --seed 1
    python -m tests.campaign --inputs 500 --only run,export
    python -m tests.campaign --at export:17 --seed 1 --keep /tmp/seen     repeats one input
    python -m tests.campaign --kills 100 --seed 1                         random SIGKILLs of a run

An input is a copy of an intact folder in which one file is damaged (`damage`). A target (`outside`,
`own`, `texts`) has functions that make and read such a folder, and one that decides whether a
change of the value that is read had to be noticed. `machine` reads the input and gives the verdict.
Input number N of a target is a pure function of the seed.
"""
