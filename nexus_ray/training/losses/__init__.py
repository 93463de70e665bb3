"""What a training minimises: each loss, and how token sums of all of them become one number."""
