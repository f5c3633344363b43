"""From trained weights to a proven file: fold, export, evaluate, release."""
