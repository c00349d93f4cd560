// Named by declarations in the runtime's headers, used by nothing that is compiled here.
#pragma once

namespace at
{
class Tensor;
}
