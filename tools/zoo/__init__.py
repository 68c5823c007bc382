"""The zoo: small trained models, each unlike the others, on which every method is measured (`bench/zoo.py`)."""
