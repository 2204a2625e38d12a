"""Bootstrap: turning hosts that run into a platform, by a list of steps that can be resumed. See spec/bootstrap."""
