"""Quality of the sparse model beside the dense one, on the same items. Read `tasks.py` first."""
