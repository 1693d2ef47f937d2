"""How much memory a plan needs: in closed form, and traced."""
