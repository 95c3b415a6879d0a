"""Plans a training run: compiles its steps for absent hardware, and derives memory and time.

`described` describes the data and `topology` the devices, `compiled` compiles the real steps for
them, `hlo` reads the compiled programs, `bounds` compares them with the data sheets, `command`
prints the plan. `benchmarks/scaling.py` writes the tables of the results page on scaling.
"""
