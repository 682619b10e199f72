"""What makes a decode step fast on a GPU, each part beside its plain counterpart and none of it needed to be right."""
