//! A training loop with a schedule, on the CPU: fits two numbers by the blended gradients of three losses.
//!
//! ```sh
//! cargo run --example step
//! ```

use gradblend::{Blender, Config, Device, Result, Schedule, Stream, TensorGrads};

fn main() -> Result<()> {
    sigpipe::reset(); // the end of `step | head` is no panic
    let stream = Stream::default();
    let mut blender = Blender::new(&Device::cpu(), Config::new(3))?; // audio, video, fused
    let schedule = Schedule::online(10, 5)?;
    // A trainer's backward passes compute these. Here loss k is |x - target_k|^2 / 2; the video loss does not reach x.
    let (on_training_data, on_held_out_data) = ([1.0_f32, 2.0], [1.2, 1.7]);
    let gradient = |x: &[f32; 2], target: [f32; 2]| [x[0] - target[0], x[1] - target[1]];

    let (mut x, mut blended) = ([0.0_f32; 2], [0.0_f32; 2]);
    // Checks the shapes and makes room for the sums; each step binds its own gradients.
    let none = [0.0_f32; 2];
    let mut plan = blender.plan([TensorGrads::new(&none, &none, &[Some(&none), None, Some(&none)])])?.release();
    for epoch in 0..20 {
        let (audio, fused) = (gradient(&x, [3.0, 1.0]), gradient(&x, on_training_data));
        let valid = gradient(&x, on_held_out_data);
        let tensor = TensorGrads::new(&fused, &valid, &[Some(&audio), None, Some(&fused)]).blended(&mut blended);
        let mut bound = plan;
        bound.update([tensor], stream)?;
        blender.step(&bound, stream)?; // dot, blend, observe: one pass
        plan = bound.release(); // ends the borrow of the gradients
        x.iter_mut().zip(blended).for_each(|(x, gradient)| *x -= 0.3 * gradient);
        if schedule.ends(epoch) {
            blender.reweight(stream)?;
            println!("epoch {epoch}: x = {x:.3?}, weights {:.3?}", blender.report(stream)?.weights);
            blender.reset(stream)?;
        }
    }
    Ok(())
}
