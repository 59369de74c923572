"""What is known of an environment: how it is made and laid out, its spaces, its reference scores."""
