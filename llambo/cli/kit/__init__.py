"""What all commands share: flags, output, errors, and how they reach the mesh."""
