"""What a run needs of a machine that is not there: compiled ahead of time, counted, and held against data sheets."""
