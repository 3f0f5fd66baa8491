"""What is deployed: files checked, and run where they can be."""
