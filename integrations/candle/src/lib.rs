//! Gradient-Blending for candle.
