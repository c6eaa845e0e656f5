//! NCCL as the engine of a group of one: with one GPU there is no larger group.
#![cfg(feature = "nccl")]

use std::time::Duration;

use cudarc::driver::CudaContext;
use gradblend::{Blender, Config, DType, Device, Error, Gradient, Nccl, Pass, Ranks, Sums, TensorGrads};
use gradblend_testkit::Outcome;
use gradblend_testkit::cuda::{on_cuda, skip};

#[test]
fn a_group_of_one() -> Outcome {
    on_cuda(|_| {
        let id = match Nccl::id() {
            Ok(id) => id,
            // Where it is not installed, this is what the test can show.
            Err(Error::Exchange { reason }) if reason.contains("no libnccl was found") => {
                skip("NCCL is not installed");
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let context = CudaContext::new(0)?;
        let (stream, other) = (context.new_stream()?, context.new_stream()?);
        assert!(matches!(Nccl::new(&stream, 1, 1, id), Err(Error::Group { .. })));
        let mut nccl = Nccl::new(&stream, 0, 1, id)?.time_out(Duration::from_secs(60));
        let mut numbers = [1.5, f64::MIN_POSITIVE];
        nccl.sum(Sums::Host(&mut numbers)).map_err(|error| error.to_string())?;
        assert_eq!(numbers, [1.5, f64::MIN_POSITIVE]);

        let mut blender = Blender::new(&Device::cuda(0)?, Config::new(1))?;
        let (t, g, v) =
            (stream.clone_htod(&[2.0_f32; 9])?, stream.clone_htod(&[1.0_f32; 9])?, stream.clone_htod(&[3.0; 9])?);
        let of = |slice| Some(Gradient::cuda(slice, &stream));
        let plan = blender.plan([TensorGrads::from_gradients((9, DType::F32), of(&t), of(&g), [of(&v)], None)])?;
        blender.pass(&plan, Pass::DOT, (&stream).into())?;
        let foreign = blender.reduce(&mut nccl, (&other).into());
        assert!(matches!(foreign, Err(Error::Exchange { reason }) if reason.contains("another stream")));
        blender.reduce(&mut nccl, (&stream).into())?;
        blender.observe((&stream).into())?;
        assert_eq!(blender.report((&stream).into())?.mean, [27.0]);
        assert_eq!(blender.nonfinite_ranks(&mut nccl, (&stream).into())?, []);
        Ok(())
    })
}
