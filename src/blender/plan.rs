//! Plans: checked lists of tensors, bound to addresses.

use std::marker::PhantomData;

use crate::backend::{AnyMemory, Memory};
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::gradient::Tracked;
use crate::process::InProcess;
use crate::table::Table;
use crate::tensor::{StreamRef, TensorGrads};

/// A checked list of parameter tensors with the memory that operations on it need. Running it allocates nothing.
///
/// A plan belongs to the blender that made it. Either may be dropped first; on a CUDA device, each drop waits for the
/// blender's work. To wait for the work of a captured graph, it waits for the whole device, which invalidates captures in
/// progress there. A graph must not be launched after its blender or its plan is dropped.
///
/// A plan of slices borrows them: [`release`](Self::release) ends the borrow and keeps the table, and
/// [`update`](Self::update) binds slices of the same lengths and dtypes again.
#[derive(Debug)]
pub struct Plan<'a> {
    pub(super) blender: u64,
    pub(super) table: Table,
    pub(super) memory: InProcess<AnyMemory>,
    pub(super) bound: bool,
    /// The plan's buffers in memory that its owner tracks; all are ordered by one stream.
    pub(super) tracked: Vec<Tracked<'a>>,
    pub(super) borrow: PhantomData<&'a mut [u8]>,
}

impl<'a> Plan<'a> {
    /// Binds other addresses for the same lengths and dtypes; other gradients may be absent than before. Allocates
    /// nothing.
    ///
    /// The update is ordered after the work submitted to `stream` before; the CPU ignores `stream`. A graph captured
    /// before uses the new addresses.
    ///
    /// # Errors
    /// Those of [`Blender::plan`](super::Blender::plan); [`Error::PlanTensors`], [`Error::Length`] or
    /// [`Error::MixedDTypes`] for tensors other than those the plan was made for; [`Error::Capturing`]. The plan then stays
    /// as it was. After [`Error::Cuda`] from a copy the plan is released, and a graph that contains it must not be launched.
    pub fn update(&mut self, tensors: impl IntoIterator<Item = TensorGrads<'a>>, stream: StreamRef<'_>) -> Result<()> {
        let memory = self.memory.get()?;
        let mut tracked = Vec::new();
        self.table.stage(with_tracked(tensors, &mut tracked))?;
        memory.check_tracked(&tracked, Some(stream))?;
        memory.check_update(self.table.staged(), stream)?;
        self.table.commit();
        self.tracked = tracked;
        let copied = memory.update(&self.table, stream);
        // After a failed copy the device's table is unknown.
        self.bound = copied.is_ok();
        copied
    }

    /// Number of tensors, and K.
    #[cfg(feature = "capi")]
    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.table.rows.tensors.len(), self.table.modalities)
    }

    /// Ends the borrow of the gradients. The plan cannot run until it is updated.
    pub fn release(mut self) -> Plan<'static> {
        self.table.unbind();
        let Plan { blender, table, memory, .. } = self;
        Plan { blender, table, memory, bound: false, tracked: Vec::new(), borrow: PhantomData }
    }
}

/// Passes tensors on, and keeps what tracks their memory.
pub(super) fn with_tracked<'a>(
    tensors: impl IntoIterator<Item = TensorGrads<'a>>,
    tracked: &mut Vec<Tracked<'a>>,
) -> impl Iterator<Item = TensorGrads<'a>> {
    tensors.into_iter().map(|mut tensor| {
        tracked.append(&mut tensor.tracked);
        tensor
    })
}
