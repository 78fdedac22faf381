"""Number formats and device operators. Needs torch (and, on a GPU, triton); imports nothing else of the project."""
