"""From a sweep's directory to a page that stands alone: numbers, pictures, and the verdict before both."""
