"""The bundled demonstration: a tiny trained base model, a data set, and a real run on them."""
