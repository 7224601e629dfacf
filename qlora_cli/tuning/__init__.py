"""`qlora tune`: a learning rate chosen by short runs on the same rows."""
