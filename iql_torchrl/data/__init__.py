"""Source -> log -> transitions -> replay buffer; ``README.md`` beside this file is the reference for users."""
