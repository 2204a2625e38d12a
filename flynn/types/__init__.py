"""The vocabulary: what the components tell each other, one definition per concept. Does no I/O."""
