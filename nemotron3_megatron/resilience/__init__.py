"""A run that minds itself: one root cause of a failure, a watchdog for hangs, policies for bad numbers."""
