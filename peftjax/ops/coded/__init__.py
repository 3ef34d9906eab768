"""Operations whose backward pass keeps codes of a few bits; forward, each is the plain operation."""
