"""Module specs: which classes implement each role of the hybrid stack. Parameter names are the same in both."""
