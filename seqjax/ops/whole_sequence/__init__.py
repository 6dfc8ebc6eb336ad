"""`implementation="xla"`: a whole sequence at once, with a derivative of its own."""
