"""Which configuration of every kernel is fastest on the card at hand, and what its upsampling costs: measured."""
