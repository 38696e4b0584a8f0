"""One command that measures everything on the machine at hand: `python -m bench.campaign`."""
