"""What the model will see, for people: tokens as text, counts, duplicates, doubts."""
