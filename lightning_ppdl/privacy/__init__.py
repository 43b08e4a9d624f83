"""What leaves a participant: selected, bounded, and in private modes perturbed and accounted for."""
