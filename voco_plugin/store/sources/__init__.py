"""Where the images of a large job come from: folders, archives, datasets, videos."""
