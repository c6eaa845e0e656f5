//! Compiles the kernels where the feature `cuda` asks for them.

#[cfg(feature = "cuda")]
#[path = "kernels/build.rs"]
mod kernels;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    kernels::build();
}
