"""What ``import scaling_ray`` offers to a notebook: small functions over the package, and the values they return."""
