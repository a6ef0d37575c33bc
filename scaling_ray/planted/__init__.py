"""The planted Census: cells drawn from a known truth, and the best loss that can be had on them."""
