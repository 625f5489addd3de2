"""What runs have written, as one page to look at: `dpo report`."""
