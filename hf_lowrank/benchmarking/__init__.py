"""Time and memory of a model beside another one and beside the floor of its matrix products."""
