"""Who calls, what they may do, and what is logged of it."""
