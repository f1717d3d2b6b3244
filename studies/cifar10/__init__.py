"""The CIFAR-10 study: a published ResNet-20 on real photographs."""
