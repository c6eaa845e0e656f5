//! Parameter tensors of networks.

/// Lengths of the 161 parameter tensors of ResNet-50 (He, Zhang, Ren, Sun, CVPR 2016).
pub fn resnet_50() -> Vec<usize> {
    let mut lengths = vec![64 * 3 * 49, 64, 64, 2048 * 1000, 1000];
    for (width, blocks, input) in [(64, 3, 64), (128, 4, 256), (256, 6, 512), (512, 3, 1024)] {
        for block in 0..blocks {
            let from = if block == 0 { input } else { 4 * width };
            lengths.extend([from * width, width, width, 9 * width * width, width, width]);
            lengths.extend([4 * width * width, 4 * width, 4 * width]);
            lengths.extend(if block == 0 { vec![from * 4 * width, 4 * width, 4 * width] } else { Vec::new() });
        }
    }
    lengths
}

#[cfg(test)]
mod tests {
    /// The published number of parameters.
    #[test]
    fn resnet_50_has_its_parameters() {
        let lengths = super::resnet_50();
        assert_eq!((lengths.len(), lengths.iter().sum::<usize>()), (161, 25_557_032));
    }
}
