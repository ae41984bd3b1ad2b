"""Getting hidden states and their mask out of a model."""
