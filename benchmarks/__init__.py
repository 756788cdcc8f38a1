"""Side-by-side runs on real text: ``python -m benchmarks.NAME --help`` in the checkout says what each measures."""
