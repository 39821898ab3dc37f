"""The runtime wing: it walks a plan and moves tensors, and makes no scheduling decision of its own."""
