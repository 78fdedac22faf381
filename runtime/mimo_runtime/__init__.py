"""mimo_runtime: loads an FP4-DFlash release and decodes with its drafter, losslessly; measures speed and quality."""
