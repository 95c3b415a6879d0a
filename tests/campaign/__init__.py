"""Damaged inputs by the thousand: what every reader makes of them, counted by verdict.

    python -m tests.campaign --inputs 10000 --seed 1
    python -m tests.campaign --inputs 500 --only run,export
    python -m tests.campaign --at export:17 --seed 1 --keep /tmp/seen     one input again
    python -m tests.campaign --kills 100 --seed 1                         random SIGKILLs of a run

An input is a copy of an intact folder in which one file is damaged (`damage`). A target (`outside`,
`own`, `texts`) says how such a folder is made and read, and which changes of what is read have to
be noticed. `machine` reads it and decides on the verdict. Input number N of a target is a pure
function of the seed.
"""
