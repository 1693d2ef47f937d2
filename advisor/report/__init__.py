"""What a person or a program is shown: each module takes the same values."""
