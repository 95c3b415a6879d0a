"""What a training run will need and take, compiled for hardware that is not there.

`described` says what the data would look like, `topology` which devices, `compiled` compiles the
real steps for them, `hlo` reads what the compiler made, `bounds` sets it against the data sheets,
`command` prints it. docs/SCALING.md holds the tables that `scaling` makes.
"""
