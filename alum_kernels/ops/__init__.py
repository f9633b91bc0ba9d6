"""What an op is: schema, checks, fake, autograd and the public function. How it is computed lives in ``backends``."""
