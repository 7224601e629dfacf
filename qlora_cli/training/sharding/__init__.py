"""A base that is divided among the processes of a run: how it is sharded, and what all of them have to compute."""
