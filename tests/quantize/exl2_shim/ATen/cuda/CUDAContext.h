// Included by the runtime's headers, used by nothing that is compiled here.
#pragma once
